"""K networks as one module: member-aware twins of torch's leaves, modules run once per member, and fusion."""
