"""What networks and convolutions cost: FLOPs, parameters, activations and bytes."""
