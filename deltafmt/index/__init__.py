"""The index of a file as typed structures: sections, references to buffers, attachments, tensor entries."""
