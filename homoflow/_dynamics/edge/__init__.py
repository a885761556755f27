"""The set where the Hessian's eigenvalues are at most a threshold, and motion along it."""
