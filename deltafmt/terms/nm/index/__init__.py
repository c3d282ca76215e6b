"""The index encodings of ``nm`` terms: how a file says which elements of a group are kept (specification, 11.4).

``encodings`` holds the rules of all of them, which need no numpy; one file an encoding holds its arrays, and ``codecs``
lists those.
"""
