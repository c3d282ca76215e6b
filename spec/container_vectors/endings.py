"""The endings of weight files, which no attachment has (section 7.2)."""

from __future__ import annotations

ENDINGS = (
    *("safetensors", "bin", "pt", "pth", "ckpt", "h5", "msgpack", "gguf", "ggml", "onnx", "npz", "npy", "pkl"),
    *("pickle", "tflite", "ot", "deltafmt", "partial", "safetensors.index.json", "bin.index.json"),
)
