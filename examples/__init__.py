"""What plugs into the package from outside it, in ten lines each; docs/data and docs/networks.md explain them."""
