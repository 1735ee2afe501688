"""Weights to and from other libraries, each of which is imported when it is used.

One module for each library, with the same four functions:

    export_weight(packed)        what the library has for one weight
    import_weight(theirs)        the inverse: a `Packed`
    export_state_dict(model)     a checkpoint as the library writes it, of a model with quantized layers
    import_state_dict(state)     its inverse: a checkpoint that `load_state_dict` of such a model takes

Codes and scales are moved, never rounded anew: what the library decodes is what `Packed.dequantize` decodes. What
cannot be moved so is an error that says why; `weight.dequantize()` is then the way, through a dense weight.

`bitsandbytes` has `export_` and `import_` too, which change the layers of a model; `peft` is LoRA on our layers.
"""
