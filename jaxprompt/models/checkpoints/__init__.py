"""File formats of backbones, one a file: reading, writing, checking."""
