"""What pyproject.toml cannot say: the native library is built if it can be, and `cuda/` is installed as lowbit/cuda."""

import importlib.util
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

NATIVE = Path("lowbit/native")
LIBRARY = "lowbit.native._lowbit"

# By its path: importing lowbit would import torch, which is not there while a package is built.
spec = importlib.util.spec_from_file_location("build_native", NATIVE / "build.py")
assert spec and spec.loader
build = importlib.util.module_from_spec(spec)
spec.loader.exec_module(build)


class BuildNative(build_ext):
    """Build the library with the package's own build. Without it the installation is complete all the same."""

    def get_ext_filename(self, fullname: str) -> str:
        return str(Path(*fullname.split(".")).with_suffix(build.SUFFIX))

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name))
        target.unlink(missing_ok=True)  # one that an earlier build left must not pass for this one's
        try:
            build.compile_to(target)
        except build.BuildError as error:
            self.warn(f"installing without the native library; its first use compiles it, if it can then: {error}")


class Wheel(bdist_wheel):
    """A wheel is for one platform if the library is inside, for any if it is not, and for every Python."""

    def get_tag(self) -> tuple[str, str, str]:
        self.root_is_pure = not Path(self.get_finalized_command("build_ext").get_ext_fullpath(LIBRARY)).exists()
        return ("py3", "none", super().get_tag()[2])


setup(
    packages=[*find_packages(include=["lowbit*"]), "lowbit.cuda"],
    package_dir={"lowbit.cuda": "cuda"},
    package_data={"lowbit.native": ["*.cpp", "*.h"], "lowbit.cuda": ["*.cu", "*.h", "*.md"]},
    # An extension for what setuptools does with one: in place for editable installs, platform folders and tags.
    ext_modules=[Extension(LIBRARY, [str(NATIVE / path.name) for path in build.sources()], optional=True)],
    cmdclass={"build_ext": BuildNative, "bdist_wheel": Wheel},
)
