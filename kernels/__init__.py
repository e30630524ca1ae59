"""Triton kernels. Importing this package imports no Triton: each module does when it is used."""
