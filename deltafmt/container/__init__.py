"""The container: header, sections, index, trailer (spec/deltafmt-v1.md, sections 3 to 9). It sees opaque bytes only."""
