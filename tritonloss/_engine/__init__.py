"""How a program walks over a map: device code and how it is launched."""
