"""Readers and writers of files; a file that is read may come from a stranger.

Every reader of the package goes through these. No code in a file is run. Sizes, shapes and types
that a file claims are compared with its real length before memory is reserved. Whatever is wrong
raises a `FileError`, whose message begins with the path of the file.
"""
