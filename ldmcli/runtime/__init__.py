"""How a model is run: device, precision, attention, memory. Applied from outside to plainly built modules."""
