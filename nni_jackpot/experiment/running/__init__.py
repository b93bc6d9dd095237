"""A run under way: device, data, network and task; and the search block by block."""
