"""Video files: `file` opens them, `read` and `write` turn them into tensors and back; frames are in `utils.frames`."""
