"""What pruning a network would gain on this device, and what holds back one that is pruned."""
