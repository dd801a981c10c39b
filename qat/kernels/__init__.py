"""Fused forms of what `affine` defines, bit-equal to it; one file each."""
