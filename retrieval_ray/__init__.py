"""retrieval_ray: a corpus goes in, a dense retriever that is better on that corpus comes out."""

__version__ = "0.1.0"
