"""Calibration: second moments of the inputs of a model's linear modules, gathered from a text, block by block.

::

    from deltafmt.calibration.run import calibrate_folder

    def on_module(name, weight_name, moments):
        delta = finetuned[weight_name] - base[weight_name]
        solved = gptq(delta, moments.matrix, grid)
        return base[weight_name] + solved.quantized.dense()   # or None: the model goes on with its own weight

    calibrate_folder("finetuned/", "text.jsonl", on_module)

``MomentStore(folder).on_module`` keeps all moments on disk for later. The modules ``text``, ``tokens``, ``state``,
``moment_store`` and ``callbacks`` need neither torch nor transformers; the others import torch when they are imported.
"""
