"""What the dtype of a config means, for every family."""


class Precision:
    """float32; bfloat16 (activations and products; parameters are cast at use); or mixed: float32,
    but the operands of matrix products are rounded to bfloat16, with float32 sums and results (in
    decoder-only models not those of attention).
    """

    dtype: str

    @property
    def mixed(self) -> bool:
        """Whether products with weights have bfloat16 operands and float32 results."""
        return self.dtype == "mixed"

    @property
    def activations(self) -> str:
        """dtype of what flows between the products."""
        return "float32" if self.mixed else self.dtype
