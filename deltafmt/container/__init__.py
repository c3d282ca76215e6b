"""The container: header, sections, index, trailer (spec/deltafmt-v1.md, sections 3 to 9).

The container treats the bytes of a section as opaque: it never decodes a term.
"""
