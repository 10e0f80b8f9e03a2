"""The losses of training libraries, by the library's name.

A module imports its library only when it is imported itself. ``llave`` and ``scores`` are the
former paths of ``llave_trainer`` and of ``llave_kernels.scores``.
"""
