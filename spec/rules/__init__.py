"""Every rule of the specification that a reader must keep, and the vectors that isolate it."""
