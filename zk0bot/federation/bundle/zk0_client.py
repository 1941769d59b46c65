from zk0bot.federation import client_app

app = client_app.app
