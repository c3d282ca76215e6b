"""The format's constants, and checks of plain values of the index. Nothing here reads or writes bytes."""
