"""This package holds the HTTP face: routes, limits, keys, streams and the page. It does not know tensors."""
