"""The paper's experiments: one as a dataclass, its training, its resumption, and many as a sweep on Dask."""
