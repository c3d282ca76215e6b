"""The kinds of terms: how each arranges its numbers in buffers, and the codecs that write and read them with numpy."""
