"""One module per backend. ``llave_kernels.dispatch`` chooses among them."""
