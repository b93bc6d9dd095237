"""A step of a search on a CPU in one pass over memory, by kernels that are compiled when first needed."""
