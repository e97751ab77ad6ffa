"""Treatments carried out: tensors in, `layerwright.nn.stored.Stored` out."""
