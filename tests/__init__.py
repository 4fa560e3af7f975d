import av  # noqa: F401 before OpenCV: see stream/sources/screen.py
