"""What prefetching is worth, end to end on virtual servers."""
