"""What both servers stand on: a microservice chassis.

It knows nothing of the application: it imports nothing of the project outside this folder, and a copy of the project
keeps it unchanged.
"""
