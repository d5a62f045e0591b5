"""Tables, figures and the published results beside the measured ones."""
