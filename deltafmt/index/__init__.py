"""The index of a file as typed structures: sections, buffers, attachments, tensor entries."""
