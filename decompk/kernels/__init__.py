"""The engine: problems, who runs them, and the kernels, one file a form. Triton loads with the first of its own."""
