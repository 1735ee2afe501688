"""The command line: `lowbit bench | plan | formats | doctor`.

Exit codes: 0 all is well, 1 a run crashed (or doctor found a fault, or a plan does not fit), 2 bad usage or input, 130
interrupted. What a user can put right is one sentence on stderr, never a traceback.
"""

from __future__ import annotations

import argparse
import difflib
import os
import sys
from collections.abc import Callable
from typing import NoReturn

from .errors import BenchError

_TOP = """\
Low-bit training of language models, measured honestly.

  lowbit bench --demo      4-bit training against BF16 Adam on this machine, in minutes
  lowbit plan              what a training step takes of memory, before there is a machine for it
  lowbit formats           how numbers can be stored, and what that costs
  lowbit doctor            what this machine and installation can do
"""


class Parser(argparse.ArgumentParser):
    """argparse whose errors are one sentence with the nearest match."""

    def error(self, message: str) -> NoReturn:
        """Print the sentence and leave with 2."""
        if message.startswith("unrecognized arguments: "):
            word = message.removeprefix("unrecognized arguments: ").split()[0]
            message = f"unknown option {word}{nearest(word, list(self._option_string_actions))}"
        print(f"lowbit: error: {message} ({self.prog} --help explains)", file=sys.stderr)
        raise SystemExit(2)


def nearest(word: str, known: list[str]) -> str:
    """A hint to append to an error, if something known looks like `word`."""
    match = difflib.get_close_matches(word, known, n=1)
    return f"; did you mean {match[0]}?" if match else ""


def run(argv: list[str]) -> int:
    """Run one command; returns the exit code."""
    from . import cli_bench, cli_info, cli_plan

    commands: dict[str, tuple[Callable[[Parser], None], Callable[..., int]]] = {
        "bench": (cli_bench.arguments, cli_bench.main),
        "plan": (cli_plan.plan_arguments, cli_plan.plan_main),
        "formats": (cli_info.formats_arguments, cli_info.formats_main),
        "doctor": (cli_info.doctor_arguments, cli_info.doctor_main),
    }
    top = Parser(
        "lowbit", description=_TOP, formatter_class=argparse.RawDescriptionHelpFormatter, usage="lowbit COMMAND …"
    )
    top.add_argument("command", metavar="COMMAND", nargs="?", help=f"{', '.join(commands)}; each has its own --help")
    top.add_argument("--version", action="version", version=_version())
    if not argv:
        top.print_help()
        return 2
    try:
        if argv[0] not in commands:
            top.parse_args(argv[:1])  # --help, --version and unknown options
            top.error(f"unknown command {argv[0]!r}{nearest(argv[0], list(commands))}; there are {', '.join(commands)}")
        add, main = commands[argv[0]]
        parser = Parser(f"lowbit {argv[0]}", formatter_class=argparse.RawDescriptionHelpFormatter)
        add(parser)
        return main(parser.parse_args(argv[1:]), ["lowbit", *argv])
    except BenchError as error:
        print(f"lowbit: error: {error}", file=sys.stderr)
        return 2
    except SystemExit as leaving:  # argparse's way out
        return leaving.code if isinstance(leaving.code, int) else 2
    except KeyboardInterrupt:
        print("lowbit: stopped", file=sys.stderr)
        return 130
    except BrokenPipeError:  # … | head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _version() -> str:
    from .machine import version

    return f"lowbit {version('lowbit') or '(run from a checkout)'}"
