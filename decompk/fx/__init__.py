"""Reading and rewriting a network: its torch.fx graph, its bytecode, what code holds, and runs that nobody notices."""
