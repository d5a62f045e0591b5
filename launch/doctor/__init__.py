"""``opdlm doctor``: is this machine, with this configuration, ready for a run?"""
