"""The quickstart's own parts: the toy task, the teacher (the user's model) and the report."""
