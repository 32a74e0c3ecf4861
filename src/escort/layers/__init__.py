"""The layers of a converted network, each an operator of torch and the module that calls it."""
