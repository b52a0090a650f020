"""Backbones: the maths, the parameters they own, and the ways weights come in and go out."""
