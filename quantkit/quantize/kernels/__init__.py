"""The numba kernels, one file per family of types; each defines `CODECS`."""
