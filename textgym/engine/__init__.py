"""How a transformer is stepped, cached, packed and read: everything below :mod:`textgym.language_model`."""
