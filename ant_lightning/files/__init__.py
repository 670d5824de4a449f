"""Reading files that may come from elsewhere: nothing in them runs, nothing large is believed.

Every reader of the package goes through these: sizes, shapes and types are compared with the bytes
that are there before memory is reserved, and what is found wrong is a `FileError` that begins with
the path of the file.
"""
