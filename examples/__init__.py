"""Complete pairs of services on the chassis, to copy from. They are no part of the image."""
