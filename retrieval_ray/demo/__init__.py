"""The bundled demo: Python's own documentation as a corpus, with hand-written questions.

The corpus is built on the user's machine from what ships with Python, so nothing is downloaded and
nothing of it is copied into this project; the questions and judgements beside this file are ours.
"""
