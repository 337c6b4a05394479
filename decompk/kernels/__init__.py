"""Triton kernels, one file a form. Nothing here is imported before a kernel is wanted: triton loads with it."""
