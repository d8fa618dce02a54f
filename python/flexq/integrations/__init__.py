"""FlexQ inside other libraries, one module each."""
