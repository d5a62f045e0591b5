"""What a model directory is: shapes and names, vocabulary, manifest, safetensors, checksums, and
the one durable writer that every file goes through.
"""
