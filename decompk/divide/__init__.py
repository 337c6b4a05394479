"""A global network cut into members and composed again; whose channels are whose; weights with zero blocks."""
