<?php
// A PHP application whose session opens the bridge's streams: BRIDGE_AUTH_URL=http://127.0.0.1:8000/bridge-login
//
// Run: php -S 127.0.0.1:8000 index.php
// In your own application only /bridge-login is new. With Laravel or Symfony, it is a route behind their session.

session_start();
header('Content-Type: application/json');

switch (parse_url($_SERVER['REQUEST_URI'], PHP_URL_PATH)) {
    case '/bridge-login':
        // Says to the bridge whose session this is.
        if (!isset($_SESSION['user'])) {
            http_response_code(401);
            echo json_encode(['detail' => 'Your session has ended. Please log in again.']);
            break;
        }
        echo json_encode(['user' => $_SESSION['user'], 'groups' => $_SESSION['groups'], 'expires_in' => 60]);
        break;
    case '/login':
        // Stands for your login page.
        session_regenerate_id(true);
        $_SESSION['user'] = $_GET['user'];
        $_SESSION['groups'] = isset($_GET['group']) ? [$_GET['group']] : [];
        echo '{}';
        break;
    case '/logout':
        session_destroy();
        echo '{}';
        break;
    default:
        http_response_code(404);
}
